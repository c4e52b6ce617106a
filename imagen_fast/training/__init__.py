"""Training of the cascade's stages, and the data sets they are trained on."""
