"""What of this machine works with deploynorm, what does not, and what to do about it.

examination = examine()          # facts alone
for finding in diagnose(examination):
    print(finding.problem, finding.remedy)
"""

from deploynorm.doctor.diagnosis import diagnose
from deploynorm.doctor.examination import examine
from deploynorm.doctor.facts import Examination
from deploynorm.doctor.finding import Finding

__all__ = ["Examination", "Finding", "diagnose", "examine"]
