"""What tests share: tiny models, stores with known bytes, faults, interrupts."""
