"""From a trained student to graphs, targets and a bundle."""
