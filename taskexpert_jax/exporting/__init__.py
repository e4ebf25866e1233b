"""`--mode=export`: a trained model as files for programs without this package; see docs/export.md."""
