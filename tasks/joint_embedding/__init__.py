"""The parts that methods which compare two whole views of an image share."""
