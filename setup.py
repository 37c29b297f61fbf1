from setuptools import setup
setup(packages=["speckv","speckv.kernels"], package_dir={"speckv.kernels":"kernels"})
