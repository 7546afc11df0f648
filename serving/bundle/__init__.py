"""The bundle folder: manifest, storage, signatures."""
