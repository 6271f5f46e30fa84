"""The parts of the training recipe; deploynorm.models.train is the loop that they serve."""
