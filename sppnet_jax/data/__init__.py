"""Images, labels and boxes: TFDS data sets, folders, and batches for training.

`sources` opens a data set, `detection_sources` one with boxes; `image_folder` and
`voc_folder` read folders in place, `tfds_records` what TFDS prepared, the embedded
`digit_scenes` among it. `batches` makes batches, `images` decodes and crops.
"""
