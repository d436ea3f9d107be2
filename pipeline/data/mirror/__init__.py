"""A `storage` that is a URI: a working folder on this machine, and its mirror in object storage.

All other code reads and writes the working folder. A unit is a folder that is uploaded and downloaded as a whole: a
store, a checkpoint, the folder of a stage. In object storage it has a record of its files, with their sizes and sha256,
which is written last (`contents.py`).
"""
