"""Images and labels: TFDS data sets, image folders, and batches for training.

`sources` opens a data set, `pipeline` turns it into batches, `images` decodes and
crops; `digit_scenes` and `image_folder` are the data sets this package makes itself.
"""
