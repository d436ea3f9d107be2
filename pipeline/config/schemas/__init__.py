"""Parts of the models of recipes: their base class, parameters of registered classes, remembered checks."""
