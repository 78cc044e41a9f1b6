"""DeepSpeed behind one class: steps, weights, states, and the builds it needs."""
