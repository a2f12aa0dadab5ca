"""Studies: arms times seeds times texts, one command, resumable, with the statistics that a claim needs."""
