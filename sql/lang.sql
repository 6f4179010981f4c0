-- purpose:    which captions get a language
-- reads:      caption
-- returns:    shard, row, uid, text
-- parameters: none
select shard, row, uid, caption as text
from samples
where caption is not null
