"""Image classification: labelled images, cross entropy, top-1 and top-5 accuracy."""
