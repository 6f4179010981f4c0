-- purpose:    which samples are looked at for faces
-- reads:      source_face_bboxes, source_width, source_height
-- returns:    shard, row, uid, boxes, boxes_from, width, height
-- parameters: none
select shard, row, uid,
       source_face_bboxes as boxes,
       if(source_face_bboxes is null, null, 'json') as boxes_from,
       source_width as width,
       source_height as height
from samples
