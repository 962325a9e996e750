"Everything about the package comes from settings.ini"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def description(text):
    "README for a package index, which doesn't have the repository's files: links to them lead to the repository, or are plain text where settings.ini names none; so with images"
    url,branch = cfg['git_url'],cfg['branch']
    if url: return re.sub(r'(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)', lambda m: f"{m[1]}[{m[2]}]({url}/{'raw' if m[1] else 'blob'}/{branch}/{m[3]})", text)
    return re.sub(r'\[([^\]]*)\]\((?![a-z]+:|#)[^)]+\)', r'\1', re.sub(r'!\[[^\]]*\]\((?![a-z]+:)[^)]+\)\n*', '', text))

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      keywords=cfg['keywords'], license=cfg['license'], python_requires=f">={cfg['min_python']}",
      packages=[cfg['lib_name']], package_data={cfg['lib_name']: ['data/*']}, include_package_data=False,
      install_requires=cfg['requirements'].split(), extras_require={o: cfg[f'{o}_requirements'].split() for o in ('dev','distributed')},
      long_description=description((here/'README.md').read_text(encoding='utf-8')), long_description_content_type='text/markdown',
      project_urls={k:v for k,v in (('Source',cfg['git_url']),('Documentation',cfg['doc_url']),('Changelog',cfg['git_url'] and f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md")) if v},
      classifiers=['Development Status :: 4 - Beta', 'Programming Language :: Python :: 3', 'Framework :: Jupyter', 'Intended Audience :: Science/Research',
                   'Intended Audience :: Developers', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
      zip_safe=False)
