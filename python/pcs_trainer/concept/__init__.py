"""What was learned, apart from the model it was learned on: files, attaching, merging, blending, compression."""
