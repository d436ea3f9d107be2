"""The order of very many images: sets of ids, and a plan that is drawn where it is used."""
