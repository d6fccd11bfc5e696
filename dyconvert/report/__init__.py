"""Drawing an analysis: pictures, numbers, and one self-contained page. Needs the extra `report`."""

from dyconvert.report.write import write_report

__all__ = ["write_report"]
