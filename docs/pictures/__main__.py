"""Draw all pictures: ``python -m docs.pictures``."""

from docs.pictures.catalog import FOLDER, PICTURES

for name, draw in PICTURES.items():
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
