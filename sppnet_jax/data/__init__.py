"""Images, labels and boxes: TFDS data sets, folders, and batches for training.

`sources` opens a data set, `detection_sources` one with boxes, `pipeline` makes
batches, `images` decodes and crops; `digit_scenes`, `image_folder` and `voc_folder` are
the data sets this package makes itself.
"""
