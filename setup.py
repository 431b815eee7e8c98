"""Package metadata. The folder `configs/` is installed as `genmodels.configs`."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "genmodels" / "__init__.py").read_text()).group(1)

REQUIRES = [
  "jax>=0.10.2,<0.13",
  "flax>=0.12.8,<0.13",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.4,<0.13",
  "grain>=0.2.18,<0.3",
  "array-record>=0.8.6",
  "tensorstore>=0.1.86",
  "jinja2>=3.1.6",
  "ml-collections>=1.1",
  "matplotlib>=3.8",
  "numpy>=2.0",
  "pillow>=10",
  "pyarrow>=16",
  "safetensors>=0.4.3",
  "scikit-learn>=1.4",
  "tensorboardX>=2.6",
  "tokenizers>=0.20",
  "xxhash>=3.4",
]

EXTRAS = {
  # A compiler: its release changes what a kernel costs, and what is one at all. Schedules are recorded of
  # these (tests/aot/bundles.json); `python -m tests.aot.bundles` records another.
  "tpu": ["libtpu>=0.0.51,<0.0.53; sys_platform == 'linux' and platform_machine == 'x86_64'"],
  "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
  "parity": ["torch==2.13.0", "transformers>=5", "peft>=0.17"],
  "audio": ["soundfile>=0.12"],
  "eval": ["lm-eval>=0.4.5"],
  "dev": [
    "setuptools>=77",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.17,<0.18",
    "import-linter>=2.5",
    "mkdocs>=1.6,<2",
  ],
}


def config_packages():
  """`genmodels.configs` and one package for each folder of system files below it."""
  folders = {p.parent.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.py")}
  return sorted({".".join(("genmodels", *folder.parts)) for folder in folders} | {"genmodels.configs"})


setuptools.setup(
  name="genmodels",
  version=VERSION,
  description="Visual autoregressive, masked-diffusion and block-diffusion models in JAX",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3 :: Only",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["genmodels", "genmodels.*"]) + config_packages(),
  package_dir={"genmodels.configs": "configs"},
  install_requires=REQUIRES,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["genmodels = genmodels.cli:main"]},
)
