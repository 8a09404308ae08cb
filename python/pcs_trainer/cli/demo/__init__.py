"""pcs demo: one subject, several methods on the embedded model; images, scores and a report of it all."""

# The methods that are shown where none is named; here, because the modules beside this load torch.
DEFAULT_METHODS = ("dreambooth", "custom_diffusion", "personalized_residuals", "textboost")
