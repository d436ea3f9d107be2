"""The store of a recipe: when and where its writing begins. Nothing here needs torch."""
