"""Records of a run: metrics file, console, TensorBoard, Weights & Biases, throughput."""
