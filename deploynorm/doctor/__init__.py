"""What of this machine works with deploynorm, what does not, and what to do about it.

print(diagnose(examine()))
"""

from deploynorm.doctor.diagnosis import diagnose
from deploynorm.doctor.examination import examine
from deploynorm.doctor.facts import Examination
from deploynorm.doctor.result import Diagnosis, Finding

__all__ = ["Diagnosis", "Examination", "Finding", "diagnose", "examine"]
