"""Networks: encoders, backbones, decoders, heads, normalisation and export formats."""
