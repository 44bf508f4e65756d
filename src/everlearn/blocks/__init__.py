"""The parts of a decoder layer: sequence mixers, feed-forward networks, and the layer that holds one of each."""
