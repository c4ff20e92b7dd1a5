"""Only what MONAI lacks, and the networks the papers name."""
