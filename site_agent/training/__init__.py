"""The inner loop: devices, optimizers, schedules, and the trainer that holds the model."""
