"""A simulated accelerator that finds unordered copies, and mutants that prove that it does."""
