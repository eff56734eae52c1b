"""Zero-shot segmentation with concept maps, measured as in the paper (arXiv 2502.04320v2, section 5).

``python -m benchmarks.segmentation --help`` from the root of the repository.
"""
