"""What train.py and test.py share: engine, checkpoints, optimizer, schedule, distributed, logging."""
