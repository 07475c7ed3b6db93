"""Tools of `route-detr` beside training: imported by its commands alone, each where it is used."""
