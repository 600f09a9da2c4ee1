"""Training data: sources, augmentation and the LightningDataModule."""
