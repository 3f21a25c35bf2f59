"""Builds the parts of the service, one part in each module. `app.py` joins the parts."""
