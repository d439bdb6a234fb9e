"""A model compiled with fusion_core and without, timed side by side: what ``fusion-core bench`` runs."""
