"""Fine-tuned models: how they are saved and read, and their predictions for images and for whole stores."""
