"""What computing tokens and loading bytes cost in seconds: formulas, and how they are fitted to what was measured."""
