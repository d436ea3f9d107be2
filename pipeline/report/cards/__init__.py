"""Model cards of exported encoders and of fine-tuned models, as Markdown, with the code that loads them."""
