"""A checkpoint as a Model: where its files are, its weights, text encoders, noise schedule and autoencoder."""

from .autoencoder import decode as decode
from .model import Model as Model
from .model import load_model as load_model
from .schedule import Schedule as Schedule
