"""Will it fit: the memory of a training run, predicted from the model's config alone."""
