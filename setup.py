"Everything about the package comes from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      keywords=cfg['keywords'], license=cfg['license'], python_requires=f">={cfg['min_python']}",
      packages=[cfg['lib_name']], package_data={cfg['lib_name']: ['data/*']}, include_package_data=False,
      install_requires=cfg['requirements'].split(), extras_require={o: cfg[f'{o}_requirements'].split() for o in ('dev','distributed')},
      long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Science/Research',
                   'Topic :: Scientific/Engineering :: Artificial Intelligence'],
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
      zip_safe=False)
