"""What is trained: the data, network, loss, validation and evaluation of each task."""
