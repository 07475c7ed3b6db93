"""The paper: Route-DETR (arXiv 2512.13876) and the detectors that it builds on."""
