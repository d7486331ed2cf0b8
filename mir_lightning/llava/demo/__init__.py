"""What runs without a download: packaged weights and a world of drawn shapes."""
