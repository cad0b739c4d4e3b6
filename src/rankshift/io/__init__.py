"""Files: native checkpoints, PEFT adapters both ways, plain models, combinations. Everything appears by one rename."""
