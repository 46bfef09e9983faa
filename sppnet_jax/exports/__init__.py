"""Networks and detectors in the formats of other programs."""
