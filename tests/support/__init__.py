"""What tests and scripts share: servers, tiny models, tars, faults, kills, roots of other versions."""
