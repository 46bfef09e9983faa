"""Images, labels and boxes: TFDS data sets, folders, and batches for training.

`sources` opens a data set; `image_folder` and `box_folder`, which is a `voc_folder`, a
`coco_folder` or a `yolo_folder`, read folders in place, `tfds_records` what TFDS
prepared, the embedded `digit_scenes` among it. `datasets` says which a run takes.
`batches` makes batches, `images` decodes and crops.
"""
