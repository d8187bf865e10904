"""Drawing images of a model: settings, a renderer, grids of pictures, and stores that any process may fill."""
