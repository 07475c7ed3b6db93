"""What `route-detr` has beside training: imported by its commands alone, each where it is used."""
